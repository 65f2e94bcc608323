#!/usr/bin/env python
"""What distillation costs: time and memory of its parts; see tools/benchmark/main.py, or --help."""

from benchmark.main import main

if __name__ == "__main__":
    main()
