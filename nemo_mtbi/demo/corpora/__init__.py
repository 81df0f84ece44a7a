# SPDX-License-Identifier: Apache-2.0
"""The corpora of the demo: a small grammar spoken by espeak-ng, and connected digits."""
