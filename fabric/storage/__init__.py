"""What the fabric keeps on disk. Nothing here knows the protocol: entries come out as they went in, or not at all.

    disk.py        the seam to the operating system, so that faults can be played
    records.py     the format of a segment, and its scanner: total, any bytes give entries or damage
    index.py       where the bursts of each feed lie
    recovering.py  what is in a directory; reads only
    segments.py    the files: made, written, closed, deleted, and their ceilings
    spill.py       the log: append, read, release, sync
    letter_rows.py   a dead letter as a row of SQLite, with a checksum of its own
    dead_letters.py  the store of dead letters
    salvage.py       what can be read of a damaged one
    hand_page.py     what is in hand, in a page that survives its process

One thread at a time; there is no lock here.
"""
