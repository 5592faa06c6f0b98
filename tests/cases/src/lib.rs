//! Tests in microVMs.
