"""Python environments: which interpreter has an engine, and the environments that qtool itself can make.

An engine whose pins clash with everybody else's runs in an interpreter of its own. `lookup` finds it, `install` makes
one, `doctor` tries them all. Nothing is imported here: `probe` runs in interpreters that have no more than the engine.
"""
