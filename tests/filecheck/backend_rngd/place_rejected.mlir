// RUN: not furiosa-llm opt %s --passes place | filecheck %s

// Two buffers of 320,000 bytes do not fit 524,288.
"rngd.block"() <{sym_name = "b"}> ({
  %x = "rngd.alloc"() <{label = "x"}> : () -> !rngd.buffer<dm, 320000>
  %y = "rngd.alloc"() <{label = "y"}> : () -> !rngd.buffer<dm, 320000>
  "rngd.dma"(%x, %y) <{command = #rngd.command<"dma run=64 source(space=dm base=0) destination(space=dm base=0)">}> : (!rngd.buffer<dm, 320000>, !rngd.buffer<dm, 320000>) -> ()
}) : () -> ()
// CHECK: error[BCK004]
// CHECK: 524288 bytes; largest buffers: x 320000, y 320000
// CHECK: next:
