"""Linear recurrences, short convolution and softmax attention: arrays in, arrays out.

    from pallas_kernels.gated_linear_attention import gated_linear_attention

Each operator has a folder: its contract in ``api.py``, an obviously right ``reference.py``, faster implementations that
are tested against it, and ``shapes.py`` with the shapes at which it is tested and timed.

Letters in docstrings: B batch, T time, D model width, H heads, K key width a head, V value width a head, C chunk length,
N chunks, W taps or window.
"""
