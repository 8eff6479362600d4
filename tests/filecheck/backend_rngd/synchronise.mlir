// RUN: furiosa-llm opt %s --passes synchronise | filecheck %s

// The sub context reads what the DMA wrote: one wait for one signal on semaphore 2·3 + 1. The
// second transfer touches other bytes and waits for nobody.
"rngd.block"() <{sym_name = "b"}> ({
^bb0(%h: !rngd.buffer<hbm, 0>):
  %x = "rngd.alloc"() <{label = "x", address = 0}> : () -> !rngd.buffer<dm, 64>
  %y = "rngd.alloc"() <{label = "y", address = 64}> : () -> !rngd.buffer<dm, 64>
  %v = "rngd.alloc"() <{label = "v", address = 0}> : () -> !rngd.buffer<vrf, 64>
  "rngd.dma"(%h, %x) <{command = #rngd.command<"dma run=64 source(space=hbm base=0) destination(space=dm base=0)">}> : (!rngd.buffer<hbm, 0>, !rngd.buffer<dm, 64>) -> ()
  "rngd.dma"(%h, %y) <{command = #rngd.command<"dma run=64 source(space=hbm base=0) destination(space=dm base=0)">}> : (!rngd.buffer<hbm, 0>, !rngd.buffer<dm, 64>) -> ()
  "rngd.exec"(%x, %v) <{command = #rngd.command<"exec context=sub a(dtype=f32) stream(run=8) commit_port(dtype=f32) commit(sink=vrf columns=8)">, operandSegmentSizes = array<i32: 1, 0, 0, 0, 1>}> : (!rngd.buffer<dm, 64>, !rngd.buffer<vrf, 64>) -> ()
}) : () -> ()
// CHECK: "rngd.dma"(%h, %x) <{command = #rngd.command<"dma signals=7 run=64
// CHECK: "rngd.dma"(%h, %y) <{command = #rngd.command<"dma run=64
// CHECK: "rngd.exec"({{.*}}exec context=sub wait(semaphore=7 count=1)
