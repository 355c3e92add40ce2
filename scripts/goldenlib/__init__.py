"""Golden cases: each module makes one group, `cli` chooses among them.

A golden is only worth its name if a broken implementation fails on it. So every module (a) randomises all weights,
biases and norms included, (b) asserts that another prompt, another seed or a part left out moves the result far more
than the tolerance that the tests allow, and (c) says which versions of the libraries answered.
"""
