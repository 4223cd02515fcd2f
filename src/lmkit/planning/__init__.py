"""What is decided about a load before a weight is read, with the reason for each choice.

A machine, a precision, a placement and a model without memory become a frozen `LoadPlan`, which `loading` executes as
it stands. Finding and checking files is `checkpoint`'s; what is decided while rows run is `engine`'s.
"""
