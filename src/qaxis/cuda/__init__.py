"""CUDA C++ compiled at first use, and the same text emulated on a CPU, thread by thread."""
