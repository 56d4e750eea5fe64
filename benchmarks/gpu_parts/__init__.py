"""The parts of `benchmarks/gpu.py`: each file checks or times one thing, in a process of its own."""
