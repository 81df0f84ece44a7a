# SPDX-License-Identifier: Apache-2.0
"""The private names of other packages that this one uses, each behind a function that says why.

The rest of the package uses public names only: ``tests/compat/test_private_names.py`` checks that, and that every name
used here is still in the installed packages. Modules are named after the package that they are about, and load it only
when a function is called; the base classes, which need it earlier, are in modules of their own.
"""
