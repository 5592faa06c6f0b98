//! Generates the code of the protocols, without an installed `protoc`.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=agent.proto");
    println!("cargo:rerun-if-changed=pod.proto");
    let builder = || tonic_prost_build::configure().build_transport(false);
    // The agent's messages have one module, whoever imports them. Its code comes second because it
    // is written by both, and only the second one is whole.
    builder()
        .extern_path(".husk.agent.v1", "crate::agent")
        .compile_fds(protox::compile(["pod.proto"], ["."])?)?;
    builder().compile_fds(protox::compile(["agent.proto"], ["."])?)?;
    Ok(())
}
