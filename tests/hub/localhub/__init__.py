"""A small Hub on 127.0.0.1, for tests: what huggingface_hub speaks, what the Hub refuses, and what can go wrong.

It speaks whoami, repositories, card validation, preupload, git-LFS (basic and multipart), Xet (tokens and its
content-addressed store), commits, pull requests, tags, branches, trees and downloads. It refuses what the Hub refuses: no, a
bad or a read-only token, someone else's name, private (404) and gated (403) repositories, one that exists (409), a stale
parent commit (412), pointers to bytes that were never uploaded, wrong checksums, large files sent as small ones, wrong card
metadata. And it fails on request: see `LocalHub.fail`.
"""

from .server import LocalHub

__all__ = ["LocalHub"]
