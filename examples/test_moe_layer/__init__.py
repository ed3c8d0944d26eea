"""
A test of a mixture-of-experts layer, split over processes, one scope a configuration.

Read in this order: `config` (what is tested), `data` and `reference` (inputs and truth),
`layer`, `quantization`, `eplb` and `backends` (what is under test), `worker` (the body of a
subtest), `launch` and `selection` (ranks, choice of configurations).
"""
