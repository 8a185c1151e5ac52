"""A pruned checkpoint onto the Hub: checked, sent, and read back.

    files       what is sent: the checkpoint's files and nothing else
    checksums   `reap/SHA256SUMS`, which `sha256sum -c` reads
    checks      of the directory, before anything is asked of the Hub
    rights      of the token and of the repository, before anything is sent
    sending     the job
    readback    the repository's listing against the files
    errors      what huggingface_hub raises, with what to do about it

Transfers are huggingface_hub's own, as are tokens, which nothing here reads, prints or stores.
"""
