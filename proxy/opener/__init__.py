"""The process that lets what a lookup named past the gate: it alone touches the kernel's sets and connections.

Workers decide what is opened and ask it (`link`); it remembers for whom (`claims`) and has the kernel do it (`kernel`).
"""
