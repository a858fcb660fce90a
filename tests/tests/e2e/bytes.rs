//! What happens to the bytes: amounts, ends, resets and backpressure, across nodes and on one node, as with plain TCP.

use crate::support::{OPENED, growth, mesh, vip};
use anyhow::Result;
use mesh_tests::app::ports;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

#[test]
fn a_gibibyte_each_way_arrives_intact() -> Result<()> {
    let cluster = mesh()?;
    let before = cluster.node("node-b")?.scrape()?;
    let report = cluster.pod("shop/web-0")?.bulk(&format!(
        "--to {}:{} --up {GIB} --down {GIB}",
        vip::PAY,
        ports::BULK
    ))?;
    assert_eq!((report.sent, report.server_verified, report.received), (GIB, GIB, GIB));
    assert_eq!(report.up_checksums.0, report.up_checksums.1);
    assert_eq!(report.down_checksums.0, report.down_checksums.1);
    let labels = [("reporter", "destination"), ("destination_service_name", "pay")];
    // Header and trailer lines come on top.
    for name in ["istio_tcp_received_bytes_total", "istio_tcp_sent_bytes_total"] {
        let node = cluster.node("node-b")?;
        let after = node.until_metrics(name, |now| growth(&before, now, name, &labels) >= GIB as f64)?;
        assert!(growth(&before, &after, name, &labels) < (GIB + 1024) as f64, "{name}");
    }
    Ok(())
}

#[test]
fn ends_and_resets_pass_through() -> Result<()> {
    let cluster = mesh()?;
    let client = cluster.pod("shop/web-0")?;
    for service in [vip::PAY, vip::DB, vip::CART, vip::LEDGER] {
        let echoed = client.dial(&format!("--to {service}:{} --send hello --shutdown", ports::ECHO))?;
        assert_eq!((echoed.received.as_str(), echoed.end.as_str()), ("hello\nbye\n", "eof"), "{service}");
        let reset = client.dial(&format!("--to {service}:{} --send x", ports::RESET))?;
        assert_eq!(reset.end, "read: reset", "{service}");
        let banner = client.dial(&format!("--to {service}:{} --timeout 1", ports::BANNER))?;
        assert!(banner.received.starts_with("220 "), "{service}: the server speaks first: {banner:?}");
        assert_eq!(banner.end, "read: timeout", "{service}: and the connection stays open");
    }
    Ok(())
}

#[test]
fn one_way_streams_of_odd_sizes_are_exact() -> Result<()> {
    let cluster = mesh()?;
    let client = cluster.pod("shop/web-0")?;
    for (up, down) in [(0, 0), (1, 0), (0, 1), (16_383, 65_537), (48 * MIB + 7, 0), (0, 48 * MIB + 7)] {
        for service in [vip::PAY, vip::DB] {
            let report = client.bulk(&format!("--to {service}:{} --up {up} --down {down}", ports::BULK))?;
            assert_eq!((report.server_verified, report.received), (up, down), "{service}");
            assert_eq!(report.up_checksums.0, report.up_checksums.1, "{service}");
            assert_eq!(report.down_checksums.0, report.down_checksums.1, "{service}");
        }
    }
    Ok(())
}

#[test]
fn a_slow_reader_gets_every_byte() -> Result<()> {
    let cluster = mesh()?;
    let report = cluster.pod("shop/web-0")?.bulk(&format!(
        "--to {}:{} --down {} --read-rate {}",
        vip::PAY,
        ports::BULK,
        40 * MIB,
        10 * MIB
    ))?;
    assert_eq!(report.received, 40 * MIB);
    assert_eq!(report.down_checksums.0, report.down_checksums.1);
    assert!(report.millis >= 3500, "the reader's rate held: {} ms", report.millis);
    Ok(())
}

#[test]
fn a_sleeping_reader_stops_the_sender_and_memory_stays_flat() -> Result<()> {
    let cluster = mesh()?;
    let client = cluster.pod("shop/web-0")?;
    for (service, what) in [(vip::PAY, "across nodes"), (vip::DB, "on one node")] {
        let memory =
            || -> Result<u64> { cluster.nodes.iter().map(|node| node.daemon()?.proc.resident_bytes()).sum() };
        // The first connection warms pools and buffers up.
        client.dial(&format!("--to {service}:{} --send x --shutdown", ports::ECHO))?;
        let before = memory()?;
        let dialled =
            client.dial(&format!("--to {service}:{} --fill {} --timeout 3", ports::SLEEP, 2 * GIB))?;
        assert_eq!(dialled.end, "write: timeout", "{what}: the sender was stopped");
        assert!(dialled.taken < 64 * MIB, "{what}: {} bytes were taken", dialled.taken);
        let grown = memory()?.saturating_sub(before);
        assert!(grown < 48 * MIB, "{what}: the daemons grew by {} MiB", grown / MIB);
        // Nobody else suffers from it.
        let report = client.connects(&format!("--to {service}:80 --n 100 --threads 4"))?;
        assert!(report.all_right(100), "{what}: {report:?}");
    }
    Ok(())
}

#[test]
fn live_connections_are_counted_when_they_close() -> Result<()> {
    let cluster = mesh()?;
    let node = cluster.node("node-a")?;
    let before = node.scrape()?;
    let client = cluster.pod("shop/web-0")?;
    for service in [vip::PAY, vip::LEDGER] {
        client.bulk(&format!("--to {service}:{} --up {MIB} --down {}", ports::BULK, 2 * MIB))?;
    }
    for service in ["pay", "ledger"] {
        let labels = [("reporter", "source"), ("destination_service_name", service)];
        let after = node.until_metrics(&format!("the closed connection to {service}"), |now| {
            growth(&before, now, "istio_tcp_connections_closed_total", &labels) == 1.0
        })?;
        assert_eq!(growth(&before, &after, OPENED, &labels), 1.0, "{service}");
        // From the source's view, Istio's `received` is what the destination received.
        let up = growth(&before, &after, "istio_tcp_received_bytes_total", &labels);
        let down = growth(&before, &after, "istio_tcp_sent_bytes_total", &labels);
        assert!((MIB as f64..MIB as f64 + 1024.0).contains(&up), "{service}: {up}");
        assert!((2.0 * MIB as f64..2.0 * MIB as f64 + 1024.0).contains(&down), "{service}: {down}");
    }
    Ok(())
}
