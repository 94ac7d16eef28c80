"""The pytest plugin: the fixture `orchard_cluster`, a whole cluster for one test.

Loaded by pytest through the entry point `orchard`; imports nothing heavy before a test asks for the fixture.
"""
