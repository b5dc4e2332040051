"""The fanotify plane: pre-content events of packs' data files, answered from presence maps or by the fill engine."""
