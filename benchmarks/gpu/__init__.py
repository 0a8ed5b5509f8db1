"""Everything that a GPU is needed for, in one run of a few minutes: ``python -m benchmarks.gpu --out DIR``.

A GPU is often at hand for minutes only. The run is a row of stages, each a process with a time limit of its own, each
writing to DIR as it goes, so that nothing is lost when time ends:

* versions, build (for this machine's Python, portable C++ alone) and compile (every kernel for the chip: fills Triton's
  cache, tells spills);
* smoke: each operator once, against the reference in float64; a failure ends the run with its name;
* parity: a covering sample of the tests' cases on the GPU, over all cores;
* behaviour: graphs, streams, no synchronisation, memory, two runs bitwise, more than 2^31 elements;
* timing: one size an operator in both memory formats beside eager PyTorch and torch.compile, with the host's time for a
  call and the floor of the bytes at the bandwidth of a copy;
* profile: the slowest of them against their floor, kernel by kernel.

``--rehearse`` runs all stages on a machine without a GPU: Triton's interpreter for values, the CPU for times.
"""
