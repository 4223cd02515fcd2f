"""How a CPU multiplies: layers in the kernels' own order or in few bits, attention, the likeliest of many scores.

Modules and functions of tensors, which know no rows, no plans and no checkpoints. When one of them is used is decided
in `planning`; that a model's modules are replaced by them happens in `loading`.
"""
