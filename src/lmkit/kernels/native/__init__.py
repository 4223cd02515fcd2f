"""Kernels of lmkit's own for x86 processors, in C++: compiled on the machine that they run on, where it can.

Small, optional and never in the way: where they cannot be had, torch's kernels compute, and it is said why.
"""
