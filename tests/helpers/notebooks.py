"""Notebooks that tests make."""


def notebook(*cells, **more):
    """What the file of a notebook with these cells of code holds."""
    return {
        "cells": [
            {"cell_type": "code", "metadata": {}, "outputs": [], "source": source}
            for source in cells
        ],
        "metadata": {},
        "nbformat": 4,
        "nbformat_minor": 0,
        **more,
    }
