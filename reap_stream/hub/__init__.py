"""MODEL from the Hugging Face Hub: an id becomes a directory whose shards come when they are read.

    names       `org/name[@revision]`, or a path
    listing     the repository's files at one commit, with sizes and hashes
    starts      headers of shards by range requests
    transfer    one file onto the disk: into the Hub's cache, or into a work directory
    fetching    the rest of a file by HTTP
    checks      length, hash and room
    provider    which shards are here, on their way, or not needed any more
    work_directory  shards that are deleted after use, and nothing else
    interrupts  Ctrl-C does not wait for a shard
    opening     all of that behind a directory, for the length of a command
    errors      what huggingface_hub raises, with what to do about it

Downloads are huggingface_hub's own; so are cache, token and offline mode.
"""
