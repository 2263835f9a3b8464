"""Array kernels: weight quantizers and float casts, compiled on first use.

Pure functions on arrays: no I/O, no logging, no import of the rest of phiconv. They are serial,
release the GIL and allocate a few rows of scratch, so that callers run them on row chunks from
their own threads; a chunk's result does not depend on how the rows were cut into chunks.
They raise `ValueError` for arguments that cannot be, and report what they met in the data.
"""
