//! Links between sites over mutual TLS 1.3.
