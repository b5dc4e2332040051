"""What a start will want of an image that nobody has watched yet, guessed from its config and its tree.

::

    command ──► entry ──┬─► loader, libraries     ELF: PT_INTERP, DT_NEEDED, /etc/ld.so.cache
      argv, env, cwd    ├─► interpreter           python's prefix, sys.path, start-up modules, *.pth
                        ├─► imports               the static import graph, out of byte code or source
                        ├─► stacks                what well-known packages load beyond that: a table
                        └─► weights               files that the entrypoint names

Everything is worked out over the index. File contents come through one callable that takes many pieces at once, and all
heuristics ask in rounds (:mod:`erofsgen.profile.guess.rounds`): what the import graph's next level needs is one
request. Nothing of the image is executed, and all of it is taken for hostile: a file that is not what it claims to be
is left out, and nothing is raised.
"""
