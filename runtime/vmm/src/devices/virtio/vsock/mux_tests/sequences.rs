//! Any sequence of steps of a hostile guest and its host.

use proptest::prelude::*;

use super::*;

/// A step of a hostile guest, or of its host.
#[derive(Debug, Clone)]
enum Step {
    Packet { guest_port: u32, host_port: u32, op: u16, flags: u32, len: usize, claim: Option<u32> },
    Raw(Vec<u8>),
    Credit { buf_alloc: u32, fwd_cnt: u32 },
    HostConnects { port: u32 },
    HostWrites(usize),
    HostReads(usize),
    HostCloses(usize),
    HostHalfCloses(usize),
    Take(usize),
    Time(u64),
}

fn step() -> impl Strategy<Value = Step> {
    let packet = (0..4u32, 0..3u32, 0..9u16, 0..4u32, 0..3000usize, any::<Option<u32>>(), 0..8u8)
        .prop_map(|(guest_port, host_port, op, flags, len, claim, lie)| Step::Packet {
            guest_port,
            // Also ports of connections that the host made.
            host_port: if host_port == 2 { FIRST_HOST_PORT } else { host_port },
            op,
            flags,
            len: if op == op::RW { len * 20 } else { 0 },
            claim: claim.filter(|_| lie == 0),
        });
    prop_oneof![
        8 => packet,
        1 => proptest::collection::vec(any::<u8>(), 0..80).prop_map(Step::Raw),
        1 => (0..200_000u32, any::<u32>()).prop_map(|(buf_alloc, fwd_cnt)| Step::Credit { buf_alloc, fwd_cnt }),
        1 => (0..4u32).prop_map(|port| Step::HostConnects { port }),
        2 => any::<usize>().prop_map(Step::HostWrites),
        2 => any::<usize>().prop_map(Step::HostReads),
        1 => any::<usize>().prop_map(Step::HostCloses),
        1 => any::<usize>().prop_map(Step::HostHalfCloses),
        4 => (1..5000usize).prop_map(Step::Take),
        1 => (0..40u64).prop_map(Step::Time),
    ]
}

fn pick(hosts: &mut [UnixStream], index: usize) -> Option<&mut UnixStream> {
    let len = hosts.len();
    hosts.get_mut(index.checked_rem(len)?)
}

fn apply(bench: &mut Bench, hosts: &mut Vec<UnixStream>, step: &Step) {
    match *step {
        Step::Packet { guest_port, host_port, op, flags, len, claim } => {
            let header = Header {
                src_cid: GUEST,
                dst_cid: HOST_CID,
                src_port: guest_port,
                dst_port: host_port,
                len: claim.unwrap_or(len as u32),
                kind: 1,
                op,
                flags,
                buf_alloc: bench.credit.buf_alloc,
                fwd_cnt: bench.credit.fwd_cnt,
            };
            let bytes = [&header.encode()[..], &vec![9; len]].concat();
            bench.mux.receive(&bytes, &mut bench.sink, bench.now);
        }
        Step::Raw(ref bytes) => bench.mux.receive(bytes, &mut bench.sink, bench.now),
        Step::Credit { buf_alloc, fwd_cnt } => bench.credit = Credit { buf_alloc, fwd_cnt },
        Step::HostConnects { port } => hosts.push(bench.connect(port, port)),
        // Sockets may be shut or closed already: any outcome will do.
        Step::HostWrites(index) => {
            let _ = pick(hosts, index).map(|host| host.write(&[3; 3000]));
        }
        Step::HostReads(index) => {
            let _ = pick(hosts, index).map(|host| host.read(&mut [0; 3000]));
        }
        Step::HostCloses(index) => {
            if !hosts.is_empty() {
                hosts.swap_remove(index % hosts.len());
            }
        }
        Step::HostHalfCloses(index) => {
            let _ = pick(hosts, index).map(|host| host.shutdown(Shutdown::Write));
        }
        Step::Take(room) => {
            bench.poll();
            if bench.mux.stage(&mut bench.sink, bench.now) {
                let (header, data) = bench.mux.take(room).expect("what was staged");
                assert!(data.len() <= room && header.len as usize == data.len());
            }
        }
        Step::Time(seconds) => bench.expire_after(Duration::from_secs(seconds)),
    }
    hosts.extend(bench.sink.accepted.drain(..).map(|(_, _, socket)| socket));
}

fn assert_consistent(mux: &Mux) {
    assert!(mux.connections.len() <= MAX_CONNECTIONS);
    assert!(mux.resets.len() <= MAX_WAITING_RESETS + MAX_CONNECTIONS);
    for (key, id) in &mux.by_key {
        assert_eq!(mux.connections[id].key, *key);
        assert_ne!(mux.connections[id].state(), State::Closed);
    }
    for (id, connection) in &mux.connections {
        assert!(connection.pending_len() <= WINDOW as usize);
        let known = mux.by_key.get(&connection.key) == Some(id);
        assert!(known || (connection.state() == State::Closed && connection.has_pending()));
        let listed = mux.ready.iter().filter(|other| *other == id).count();
        assert_eq!(listed, usize::from(connection.queued));
    }
    assert!(mux.ready.iter().all(|id| mux.connections.contains_key(id)));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn no_sequence_of_packets_breaks_or_leaks(steps in proptest::collection::vec(step(), 0..200)) {
        let mut bench = Bench::new();
        let mut hosts = Vec::new();
        let mut asked = 0;
        for step in &steps {
            if bench.mux.accepts_packets() {
                asked += usize::from(matches!(step, Step::HostConnects { .. }));
                apply(&mut bench, &mut hosts, step);
            }
            assert_consistent(&bench.mux);
        }

        // The host's process goes away, the guest resets what it knows: nothing is left.
        drop(hosts);
        bench.credit = Credit { buf_alloc: u32::MAX, fwd_cnt: 0 };
        bench.poll();
        let keys: Vec<_> = bench.mux.by_key.keys().copied().collect();
        for key in keys {
            bench.send(key, op::RST);
        }
        for _ in 0..10 {
            bench.poll();
        }
        while bench.next().is_some() {}
        bench.assert_empty();
        // Every request of the host's was answered exactly once.
        prop_assert_eq!(bench.sink.connected.len() + bench.sink.refused.len(), asked);
    }
}
