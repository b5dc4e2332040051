"""Where a file of an image is: its chunks, their frames and packs, who has them, and who shares them."""
