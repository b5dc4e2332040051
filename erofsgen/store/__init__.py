"""Where blobs live: one small interface, always an OCI image layout."""
