"""What a caller may say of a row: options, each declared once, and one value for all rows or one each.

The only room that makes a `GenerationConfig`. Options of `load` are in `loading`.
"""
