"""The Triton kernels, installed as `fastseg.kernels`: a module for each operator, or for each of its kernels.

Importing this package imports no Triton: an operator's GPU implementation imports what it launches at the first call.
``python -m fastseg.kernels`` compiles them without a GPU, or tunes them on one.
"""
