//! Random loss on a node's wire, by nftables in the node's namespace.

use crate::netns::NetNs;
use anyhow::Result;

/// Drops this share of the packets that a node forwards between its pods and the fabric; 0 takes the rule away.
pub fn set_loss(node: &NetNs, percent: u8) -> Result<()> {
    // Declared first, so that the deletion never fails.
    let mut script = "table inet faults {}\ndelete table inet faults\n".to_owned();
    if percent > 0 {
        script += &format!(
            "table inet faults {{\n chain forward {{\n type filter hook forward priority 0;\n\
             meta oifname eth0 numgen random mod 100 < {percent} drop;\n\
             meta iifname eth0 numgen random mod 100 < {percent} drop;\n }}\n}}\n"
        );
    }
    node.nft(&script)
}
