"""Contracts: what a system of each kind must do, as a small protocol and a suite of laws.

A kind has one file here: the record that its systems end with (a `System` with the functions of
the protocol), and its laws, pure functions ``law(record, world) -> error`` that are 0 where the law
holds (those of `optimizer` and `stream` in files of their own). `tests/contracts` runs every record
of the registry through its laws, and shows for each law a broken record that fails it.

===================================  ========================================================
`initialisation`, `optimizer`,       how adapters start, and how they are trained
`penalty`, `schedule`, `preference`
`router`                             which experts a token goes to
`aggregation`, `stream`              rounds of clients, tasks that come one after the other
`composition`, `server`              several adapters in one loop, many over one base
`generator`                          an adapter from a condition
===================================  ========================================================

`tiny` is the model that several kinds are measured on, `distance` what errors are.

Adaptation methods have their laws in `jlora.contract`, merging methods in
`jlora.merging.engine.laws`.
"""
