"""One job done by several processes, ranks, each with a device or a share of the cores of its own.

What is divided: calibration rows (a rank runs whole batches) and the writing of kept weights. What
is not: every rank reads every layer, since each runs it on rows of its own. What travels is small:
sums of [sources, experts] for each layer and a few words about what is done; hidden states and
weights stay where they are. So gloo carries it, on GPUs too: NCCL would win nothing on kilobytes,
takes device memory, and refuses ranks that share a GPU.

All ranks go through the same steps in the same order, and every exchange among them is one
`Ranks.gather`. A rank that fails gives its error as its part of the next one, so that none waits for
an answer that never comes; one that dies closes its connections, which the others notice there.
"""
