"""The GPU benchmark: `python -m pallas_kernels.bench`. Each op's cases are in its own folder, `<op>/bench.py`."""
