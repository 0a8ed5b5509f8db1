"""The benchmark suite: fastseg beside plain PyTorch, eager and compiled, in one run on one machine.

``python -m benchmarks --out FILE.md`` measures and writes the tables and a chart; ``pytest benchmarks/`` gives
pytest-benchmark's own output, and its ``--benchmark-json`` file becomes the same tables with
``python -m benchmarks --from FILE.json --out FILE.md``. ``--quick`` measures a few cases in a few rounds;
``--device cuda`` measures on a GPU, in bfloat16, in less than 8 minutes (`harness.compile_time` says how);
``--sweep`` measures instead how the upsampling operators' cost grows with classes and pixels, beside eager PyTorch.

How it is measured:

* Verified first: what a contestant will be timed on (values and gradients) is held to a float64 truth, on a GPU too;
  one that fails is not timed, its benchmarks fail, and the report says so. The same goes for a torch.compile that
  doesn't compile.
* Interleaved: a round times every contestant of a case once, in an order drawn anew, so that a busy moment of the
  machine, the clock's ups and downs and what the neighbour leaves in the caches meet all of them. pytest-benchmark
  times one function after the other, so the rounds are timed here (`suite.measure`) and handed to it with a clock that
  moves by the recorded seconds; statistics, tables, JSON and comparisons are pytest-benchmark's.
* Ratios are taken within each round, then their median and quartiles are quoted.
* Compilation and warm-up calls are not counted.
* OpenVINO, where it is installed (the extra ``bench``), is a peer of the inferences on a CPU: it gets as many threads
  as torch and the dtype of the case, and no copy of input or output is timed (`openvino_peer`).
  Of third-party models' predictions ONNX Runtime is a peer as well (`onnxruntime_peer`).
* A GPU's time is its own: events around the passes, and before each call other work that covers the launches and
  empties the caches. Of calls that are shorter than their launch, many are timed in a row from an idle device.
* Peak memory is the growth, during one warm call, of the process's resident set (`memory`) or of what torch's allocator
  has given out on a GPU. Extra memory is that without the values and gradients that the call returns.
* The roofline (`roofline`) has two ceilings, the peaks of bandwidth and arithmetic, which the run measures before the
  cases of each operator; the highest count.

``python -m benchmarks.third_party`` is a suite of its own, of models of other libraries.

``python -m benchmarks.reports`` draws the pictures of stored results again.

A case is one line in the ``CASES`` of a ``cases/bench_<operator>.py``. What measures them is in `harness`, what writes
tables and pictures in `reports`.
"""
