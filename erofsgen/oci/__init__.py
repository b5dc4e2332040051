"""Images in: references, registry client, layouts and archives, layers to one tree."""
