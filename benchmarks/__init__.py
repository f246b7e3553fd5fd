"""Times of jaxconv_fc beside other ways to the same result, and beside what the machine needs at least.

    python -m benchmarks [TABLE ...] [--quick] [--rounds N] [--out FOLDER]
    python -m benchmarks --guard

The contestants of a row do the same job. They are timed in turns in one process, so their ratios hold on
a machine that is not quiet. A table is written as soon as it is complete: results.json and results.md.
``pip install '.[bench]'`` brings the other libraries. What is not installed is left out, and the table says
so: asdex needs Python 3.12.

``--quick`` takes one small row of each table and compares the results of the contestants: its times mean
nothing. ``--guard`` measures a few ratios and fails where one of them is far from what it was. ``--summary``
prints the table of docs/measured.md from the committed results.
"""
