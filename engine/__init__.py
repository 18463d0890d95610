"""The engine: compiled, selectively quantized diffusers pipelines behind one worker thread. Knows no user interface."""
