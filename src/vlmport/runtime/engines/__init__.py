"""Test an engine before a component is trusted to it.

probing.py compares what an engine computes with ONNX Runtime's CPU kernels, in a process of its
own. trust.py starts that process, and keeps what passed.
"""
