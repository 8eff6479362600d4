// RUN: furiosa-llm opt %s --passes schedule | filecheck %s --check-prefix OVERLAP
// RUN: furiosa-llm opt %s --passes "schedule{level=0}" | filecheck %s --check-prefix SERIAL

// The second load needs nothing from the moves before it: it is issued ahead of the second one.
// At level 0 it comes after both. Buffers say from when to when they hold something.
"rngd.block"() <{sym_name = "b"}> ({
^bb0(%h: !rngd.buffer<hbm, 0>):
  %x = "rngd.alloc"() <{label = "x"}> : () -> !rngd.buffer<dm, 4096>
  %v = "rngd.alloc"() <{label = "v"}> : () -> !rngd.buffer<vrf, 64>
  %w = "rngd.alloc"() <{label = "w"}> : () -> !rngd.buffer<vrf, 64>
  "rngd.dma"(%h, %x) <{command = #rngd.command<"dma n=64 run=4096 source(space=hbm base=0 strides=4096) destination(space=dm base=0 strides=4194304)">}> : (!rngd.buffer<hbm, 0>, !rngd.buffer<dm, 4096>) -> ()
  "rngd.exec"(%x, %v) <{command = #rngd.command<"exec context=sub a(dtype=f32) stream(run=8) commit_port(dtype=f32) commit(sink=vrf columns=8)">, operandSegmentSizes = array<i32: 1, 0, 0, 0, 1>}> : (!rngd.buffer<dm, 4096>, !rngd.buffer<vrf, 64>) -> ()
  "rngd.exec"(%x, %w) <{command = #rngd.command<"exec context=sub a(dtype=f32) stream(run=8) commit_port(dtype=f32) commit(sink=vrf columns=8)">, operandSegmentSizes = array<i32: 1, 0, 0, 0, 1>}> : (!rngd.buffer<dm, 4096>, !rngd.buffer<vrf, 64>) -> ()
  %y = "rngd.alloc"() <{label = "y"}> : () -> !rngd.buffer<dm, 64>
  "rngd.dma"(%h, %y) <{command = #rngd.command<"dma run=64 source(space=hbm base=0) destination(space=dm base=0)">}> : (!rngd.buffer<hbm, 0>, !rngd.buffer<dm, 64>) -> ()
}) : () -> ()
// OVERLAP: label = "y", lifetime = array<i64: 
// OVERLAP: "rngd.dma"(%h, %x)
// OVERLAP: "rngd.dma"(%h, %y)
// OVERLAP: "rngd.exec"(%x, %w)
// SERIAL: "rngd.dma"(%h, %x)
// SERIAL: "rngd.exec"(%x, %v)
// SERIAL: "rngd.exec"(%x, %w)
// SERIAL: "rngd.dma"(%h, %y)
