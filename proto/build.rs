//! Generates the code of the protocol, without an installed `protoc`.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=agent.proto");
    let files = protox::compile(["agent.proto"], ["."])?;
    tonic_prost_build::configure().build_transport(false).compile_fds(files)?;
    Ok(())
}
