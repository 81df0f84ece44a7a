# SPDX-License-Identifier: Apache-2.0
from cut_fixtures import chat, corpus, frames  # noqa: F401
