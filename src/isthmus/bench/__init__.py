"""Benchmarks behind `isthmus bench …`: ratios in one run, alternating, medians, fidelity beside speed."""
