"""Jobs: the rows of a file answered into another, whatever comes between.

`journal` holds what is done, `files` reads and writes the formats, and `job` puts them together. A job knows no model:
who runs one says what a row is asked and how it is answered.

What is written, and in which order: the journal's header; then a record per row, in the order in which rows end, each
by one `write`; at the end the output, in the order of the input, beside its place; and its rename. So whatever is cut
short, the journal has all rows that ended, and the output is the old one or the new one.
"""
