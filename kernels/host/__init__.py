"""The native module, its threads and its C++ source. What it computes is defined elsewhere in kernels/."""
