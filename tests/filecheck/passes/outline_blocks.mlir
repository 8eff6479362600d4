// RUN: furiosa-llm opt %s --passes outline-blocks --split-input-file | filecheck %s

// Two equal layers and one of another kind: two block functions, called with each layer's own
// parameters and location. Inside, locations are relative and attention has no layer.
nn.parameter @table : tensor<9x4xf32>
nn.parameter @h.0.up.weight : tensor<4x4xf32>
nn.parameter @h.1.up.weight : tensor<4x4xf32>
func.func @forward(%ids: tensor<2x3xi32>, %pos: tensor<2x3xi32>) -> tensor<2x3x4xf32> {
  %t = nn.get_parameter @table : tensor<9x4xf32>
  %w0 = nn.get_parameter @h.0.up.weight : tensor<4x4xf32>
  %w1 = nn.get_parameter @h.1.up.weight : tensor<4x4xf32>
  %x = nn.embedding %ids, %t : tensor<2x3xi32>, tensor<9x4xf32> -> tensor<2x3x4xf32> loc("wte"("a"))
  %0 = nn.linear %x, %w0 : tensor<2x3x4xf32>, tensor<4x4xf32> -> tensor<2x3x4xf32> loc("h.0.up"("b"))
  %1 = nn.reshape %0 : tensor<2x3x4xf32> -> tensor<2x1x3x4xf32> loc("h.0"("c"))
  %2 = nn.attention %1, %1, %1 scale 0.5 causal layer 0 : tensor<2x1x3x4xf32>, tensor<2x1x3x4xf32>, tensor<2x1x3x4xf32> -> tensor<2x3x1x4xf32> loc("h.0.attn"("d"))
  %3 = nn.reshape %2 : tensor<2x3x1x4xf32> -> tensor<2x3x4xf32> loc("h.0"("e"))
  %4 = nn.linear %3, %w1 : tensor<2x3x4xf32>, tensor<4x4xf32> -> tensor<2x3x4xf32> loc("h.1.up"("f"))
  %5 = nn.reshape %4 : tensor<2x3x4xf32> -> tensor<2x1x3x4xf32> loc("h.1"("g"))
  %6 = nn.attention %5, %5, %5 scale 0.5 causal layer 1 : tensor<2x1x3x4xf32>, tensor<2x1x3x4xf32>, tensor<2x1x3x4xf32> -> tensor<2x3x1x4xf32> loc("h.1.attn"("h"))
  %7 = nn.reshape %6 : tensor<2x3x1x4xf32> -> tensor<2x3x4xf32> loc("h.1"("i"))
  %8 = nn.rope %5, %pos scaling 1.0 inv_freq [1.0] : tensor<2x1x3x4xf32>, tensor<2x3xi32> -> tensor<2x1x3x4xf32> loc("h.2"("j"))
  %9 = nn.attention %8, %8, %8 scale 0.5 causal layer 2 : tensor<2x1x3x4xf32>, tensor<2x1x3x4xf32>, tensor<2x1x3x4xf32> -> tensor<2x3x1x4xf32> loc("h.2.attn"("k"))
  %10 = nn.reshape %9 : tensor<2x3x1x4xf32> -> tensor<2x3x4xf32> loc("h.2"("l"))
  %11 = nn.add %7, %10 : tensor<2x3x4xf32>, tensor<2x3x4xf32> -> tensor<2x3x4xf32> loc("h.2"("m"))
  %12 = nn.tanh %11 : tensor<2x3x4xf32> loc("head"("n"))
  func.return %12 : tensor<2x3x4xf32>
}
// CHECK:      func.func @forward
// CHECK:        [[X:%.*]] = func.call @prologue(%ids, %t) : {{.*}} loc("")
// CHECK-NEXT:   [[X0:%.*]] = func.call @block_0([[X]], %w0) : {{.*}} loc("h.0")
// CHECK-NEXT:   [[K1:%.*]], [[X1:%.*]] = func.call @block_1([[X0]], %w1) : {{.*}} loc("h.1")
// CHECK-NEXT:   [[X2:%.*]] = func.call @block_2([[K1]], %pos, [[X1]]) : {{.*}} loc("h.2")
// CHECK-NEXT:   [[Y:%.*]] = func.call @epilogue([[X2]]) : {{.*}} loc("")
// CHECK-NEXT:   func.return [[Y]]
// CHECK:      func.func private @prologue(%ids: {{.*}}, %table: {{.*}}) -> tensor<2x3x4xf32>
// CHECK-NEXT:   nn.embedding %ids, %table {{.*}} loc("wte"("a"))
// CHECK:      func.func private @block_0(%{{.*}}, %up_weight: tensor<4x4xf32> {{.*}}) -> tensor<2x3x4xf32>
// CHECK-NEXT:   nn.linear {{.*}} loc("up"("b"))
// CHECK-NEXT:   nn.reshape {{.*}} loc(""("c"))
// CHECK-NEXT:   nn.attention {{.*}} scale 0.5 causal : {{.*}} loc("attn"("d"))
// CHECK:      func.func private @block_1({{.*}}) -> (tensor<2x1x3x4xf32>, tensor<2x3x4xf32>)
// CHECK:      func.func private @block_2
// CHECK-NEXT:   nn.rope %{{.*}}, %pos
// CHECK:      func.func private @epilogue
// CHECK-NEXT:   nn.tanh {{.*}} loc("head"("n"))

// -----

// Equal layers share a function, whatever their number is; what lies between two layers goes with
// the one before, a constant goes where it is used.
func.func @forward(%q: tensor<2x1x3x4xf32>) -> tensor<2x3x1x4xf32> {
  %c = nn.constant dense<2.0> : tensor<1xf32> loc("elsewhere"("c"))
  %0 = nn.attention %q, %q, %q scale 0.5 causal layer 0 : tensor<2x1x3x4xf32>, tensor<2x1x3x4xf32>, tensor<2x1x3x4xf32> -> tensor<2x3x1x4xf32> loc("m.9.attn")
  %1 = nn.mul %0, %c : tensor<2x3x1x4xf32>, tensor<1xf32> -> tensor<2x3x1x4xf32> loc("m.9")
  %2 = nn.transpose %1 dims 1, 2 : tensor<2x3x1x4xf32> -> tensor<2x1x3x4xf32> loc("m"("between"))
  %3 = nn.attention %2, %2, %2 scale 0.5 causal layer 1 : tensor<2x1x3x4xf32>, tensor<2x1x3x4xf32>, tensor<2x1x3x4xf32> -> tensor<2x3x1x4xf32> loc("m.10.attn")
  %4 = nn.mul %3, %c : tensor<2x3x1x4xf32>, tensor<1xf32> -> tensor<2x3x1x4xf32> loc("m.10")
  %5 = nn.transpose %4 dims 1, 2 : tensor<2x3x1x4xf32> -> tensor<2x1x3x4xf32> loc("m"("between"))
  %6 = nn.attention %5, %5, %5 scale 0.5 causal layer 2 : tensor<2x1x3x4xf32>, tensor<2x1x3x4xf32>, tensor<2x1x3x4xf32> -> tensor<2x3x1x4xf32> loc("m.11.attn")
  func.return %6 : tensor<2x3x1x4xf32>
}
// CHECK:      func.func @forward(%q: {{.*}})
// CHECK-NEXT:   [[X9:%.*]] = func.call @block_0(%q) : {{.*}} loc("m.9")
// CHECK-NEXT:   [[X10:%.*]] = func.call @block_0([[X9]]) : {{.*}} loc("m.10")
// CHECK-NEXT:   [[X11:%.*]] = func.call @block_1([[X10]]) : {{.*}} loc("m.11")
// CHECK-NEXT:   func.return [[X11]]
// CHECK:      func.func private @block_0
// CHECK-NEXT:   [[C:%.*]] = nn.constant dense<2.0{{.*}}> : tensor<1xf32> loc(""("c"))
// CHECK-NEXT:   [[A:%.*]] = nn.attention {{.*}} loc("attn")
// CHECK-NEXT:   nn.mul [[A]], [[C]] : {{.*}} loc("")
// CHECK-NEXT:   nn.transpose {{.*}} loc(""("between"))
// CHECK:      func.func private @block_1

// -----

// Blocks are found by attention: a list of experts inside a layer is no list of blocks.
func.func @forward(%q: tensor<2x1x3x4xf32>) -> tensor<2x3x1x4xf32> {
  %0 = nn.attention %q, %q, %q scale 0.5 causal : tensor<2x1x3x4xf32>, tensor<2x1x3x4xf32>, tensor<2x1x3x4xf32> -> tensor<2x3x1x4xf32> loc("layers.0.attn")
  %1 = nn.exp %0 : tensor<2x3x1x4xf32> loc("layers.0.experts.0")
  %2 = nn.exp %1 : tensor<2x3x1x4xf32> loc("layers.0.experts.1")
  func.return %2 : tensor<2x3x1x4xf32>
}
// CHECK:      func.func @forward
// CHECK-NEXT:   func.call @block_0(%q) : {{.*}} loc("layers.0")
// CHECK-NEXT:   func.return
// CHECK:      func.func private @block_0
// CHECK-NEXT:   nn.attention {{.*}} loc("attn")
// CHECK-NEXT:   nn.exp {{.*}} loc("experts.0")
// CHECK-NEXT:   nn.exp {{.*}} loc("experts.1")

// -----

// Nothing to outline without numbered blocks.
func.func @forward(%q: tensor<2x1x3x4xf32>) -> tensor<2x3x1x4xf32> {
  %0 = nn.attention %q, %q, %q scale 0.5 causal : tensor<2x1x3x4xf32>, tensor<2x1x3x4xf32>, tensor<2x1x3x4xf32> -> tensor<2x3x1x4xf32> loc("attn")
  func.return %0 : tensor<2x3x1x4xf32>
}
// CHECK:      func.func @forward
// CHECK-NEXT:   nn.attention
