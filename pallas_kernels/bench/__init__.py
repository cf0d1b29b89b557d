"""The GPU benchmark: `python -m pallas_kernels.bench`. Each op's cases are in its own folder, `<op>/bench.py`.

How time is measured:

- A *dispatch* is one compiled program that runs an op in each of 32 layers, one after another, every layer with a pool
  of its own: what a step of a 32-layer model does. The tables that a step makes once are made once in it. Where one
  call's result is not the next one's argument, an optimization barrier keeps their order. Times are per layer.
- Dispatches follow each other without a wait and rotate over sets of adapters, or of pages, until 192 MiB were read:
  no cache holds the weights or the keys. A round is as many dispatches as take 30 ms, and one wait at its end.
- Rounds of the systems of a case take turns; the median over seven rounds is reported. Nothing is subtracted: launch
  gaps and the program's own small kernels are in the numbers.
- The reference runs in one layer per dispatch. `ragged_dot` and the loop over adapters run in one to eight, on matrices
  that were gathered from the pool before, outside the timed part, which is generous to them.
- Floors (`<op>/roofline.py`) are of the bytes and operations that must be, at the copy bandwidth and the matrix rate
  that were measured in the same run.

Before anything is timed, every kernel's result is compared with the XLA reference on the device, in a pool where pages
that do not belong to the batch are NaN; what is wrong there is not timed.
"""
