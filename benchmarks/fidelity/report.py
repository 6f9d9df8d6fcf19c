"""Stub."""


def write_report(store, results, kinds): ...
