"""Third-party models: a training step and a prediction by eager PyTorch, torch.compile and backend="fastseg".

``python -m benchmarks.third_party --out FILE.md --readme README.md`` measures all of `CASES` and writes the
tables: to FILE.md, and their summary between two marks of the README as well. ``--only NAME`` (as often as wanted)
measures some; with ``--json FILE``, what is measured replaces its old lines in FILE, and the tables are written of all
that FILE holds. It needs the extra ``models``: a model whose library isn't installed is listed as not measured, with
the reason, and no table is written where none could be measured.

A training step is the loss and the gradients of all parameters, without the optimizer's part; a prediction goes from
images to class numbers, in evaluation, under ``no_grad``. Both are measured as the rest of the suite is (`suite`):
verified against a float64 truth first, then timed in interleaved rounds. Each model has processes of its own: one for
times, and one for memory, where what was there before doesn't count (see `measuring.PAGES_OF_THEIR_OWN`).
"""
