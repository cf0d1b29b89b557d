"""The GPU benchmark, `python -m experiments.kernel_bench`. Each op's cases are in its own folder, `<op>/bench.py`.

Every section runs in a process of its own. It first compares every kernel's result with the XLA reference on the
device, in a pool where pages outside the batch are NaN; a system whose result is wrong is not timed. Then it measures
the cases in order of importance until its share of the time limit is spent.

How time is measured:

- A *dispatch* is one compiled program that runs an op in each of 32 layers in sequence, every layer with its own pool,
  as a step of a 32-layer model does. Tables that a step builds once are built once per dispatch. Where a call's result
  is not the next call's argument, an optimization barrier keeps their order. Times are per layer.
- Dispatches are enqueued without a wait and rotate over sets of adapters, or of pages, until 192 MiB were read: no
  cache holds the weights or the keys. A round has as many dispatches as take 30 ms, and one wait at its end.
- Rounds of a case's systems are interleaved; the median of seven rounds is reported. Nothing is subtracted: launch gaps
  and the program's small kernels are included.
- The reference runs in one layer per dispatch. `ragged_dot` and the loop over adapters run in one to eight, on matrices
  gathered from the pool before the timed part, which favours them.
- Floors (`<op>/roofline.py`) are the least bytes and operations, at the copy bandwidth and the matrix rate measured in
  the same run.
"""
