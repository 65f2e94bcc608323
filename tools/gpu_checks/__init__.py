"""What `make test-gpu` checks and measures; tools/test_gpu.py runs it.

    packages  which packages are missing, and how to install them
    report    checks with results, a table and a json file
    cells     the laws' suite, waiting and half precision, for every loss and kind of detector
    teachers  the prepared teacher against the plain one
    runs      whole trainings: pinned loaders, resume, a process group
    costs     time and memory of a distilled step

All functions take a device, so that the tests run them on a CPU.
"""
