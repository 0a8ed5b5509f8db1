"""The Triton kernels, one module an operator, installed as `fastseg.kernels`.

Importing this package imports no Triton: an operator's CUDA implementation imports its module at the first call.
"""
